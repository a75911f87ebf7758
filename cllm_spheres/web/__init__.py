"""A trained model behind HTTP: the API that OpenAI's clients speak."""

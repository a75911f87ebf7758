"""GPT-2 in one flat buffer of parameters and one arena of activations."""

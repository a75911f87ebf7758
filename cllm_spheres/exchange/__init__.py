"""Models to and from other tools: Hugging Face folders and GGUF files."""

"""A model for others: as a GGUF file, as an Ollama model, on the Hugging Face hub. No torch in this process."""

"""Models as they come: from the Hub, a GGUF file, or a random generator."""

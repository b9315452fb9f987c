"""Archives on their way: compressed, hashed, read and written beside the thread that makes them."""

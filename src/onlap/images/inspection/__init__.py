"""An image's history, its files by layer, and how two images differ."""

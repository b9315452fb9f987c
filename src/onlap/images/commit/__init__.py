"""An image made of a snapshot."""

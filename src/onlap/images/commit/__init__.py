"""An image made from a snapshot."""

"""An archive becomes a layer's directory."""

"""Layers of other stores, compared with what their archives say."""

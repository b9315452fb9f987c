"""Formats of images in files: OCI layouts, archives of ``docker save``, plain trees."""

"""Images on a disk: OCI layouts, archives of ``docker save``, plain trees."""

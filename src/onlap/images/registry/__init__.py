"""Images from and to registries: how they are reached, who we are to them, what they hold."""

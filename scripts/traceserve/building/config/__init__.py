"""What can be built: the configuration, and the tables of what goes together. No torch here."""

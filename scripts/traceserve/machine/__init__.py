"""This machine: environment variables, disks, user folders and chips."""

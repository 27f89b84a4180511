"""What this machine is: its libraries' settings, disks, user folders and chips."""

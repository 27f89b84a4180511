"""A page for people: a form for each archive that is served, and its answers as they are best seen."""

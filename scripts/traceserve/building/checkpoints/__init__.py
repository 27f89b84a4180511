"""What a checkpoint is: which files and keys of it are understood, which task it was trained for, what it needs beside them."""

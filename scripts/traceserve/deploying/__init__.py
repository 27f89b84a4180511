"""Files for containers, clusters and clouds, made from archives: what the archives say, a plan, the files."""

"""The pages, one file each. What a page shows is read from files each time it looks."""

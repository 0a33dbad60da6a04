"""Where rows come from: the entries of dataset_info.json, and the files they name."""

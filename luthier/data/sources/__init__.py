"""Where rows come from: dataset_info.json and its entries, and the files they name."""

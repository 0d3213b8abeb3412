"""What runs have learned and forgotten: results.json, comparison.json, and what is drawn of them."""

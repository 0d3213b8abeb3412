"""docs/results/evidence.md, its plots and the table of the README, made from the committed result files."""

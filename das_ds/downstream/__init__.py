"""End tasks: fine-tuning classifiers on the models of a run, and scoring them."""

"""End tasks: fine-tuning classifiers on the models of a run, and scoring them.

Set in the config as `tasks`, run as `das-ds finetune`.
"""

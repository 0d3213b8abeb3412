"""Networks: architecture tables, unit gates, loading. The only importer of transformers' model classes."""

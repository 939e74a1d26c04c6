"""Console progress, metrics.jsonl, summary.json, wandb and the report of a run."""

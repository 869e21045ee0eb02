"""What people look at: the report, the model card, metrics, answers, scores."""

"""Pure compute: data, models, losses, teacher, student, evaluation. No Prefect, no store."""

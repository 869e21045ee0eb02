"""Pure compute: data, models, losses, teacher, student, evaluation. No paths, no Prefect, no store."""

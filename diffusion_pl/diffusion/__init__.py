"""What the papers share: levels, schedules, preconditioning, objective, guidance."""

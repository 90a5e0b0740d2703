"""The training loop and what it needs: losses, miners, optimizers, schedules, callbacks."""

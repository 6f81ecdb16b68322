"""The commands about routing traces and tuning, without a front end. Never imports torch."""

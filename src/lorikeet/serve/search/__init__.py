"""Looking things up: `decide` says when and why, `provider` fetches the results."""

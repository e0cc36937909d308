"""From a request to a verdict: what is feasible, the autopilot, the outcome, recipes."""

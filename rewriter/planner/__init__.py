"""The planner: which table goes where, what that costs, and whether it fits."""

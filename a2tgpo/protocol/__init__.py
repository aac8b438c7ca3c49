"""How the policy writes tool calls and answers, and how it reads the results of its calls."""

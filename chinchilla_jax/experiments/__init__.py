"""Many runs: families of them, what came of them, and the page to look at."""

"""Methods compared over real domains: which forgets less at equal learning, and what it costs."""

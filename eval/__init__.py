"""One benchmark a file: first generate the answers, then score them; `statistics` compares two models' answers."""

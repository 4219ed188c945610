"""What the scripts beside this folder share: models and what they are asked to do, peers, floors of time, tables."""

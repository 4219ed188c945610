"""What scoreboard.py is made of: what models are asked to do, what users could pick, tables and the picture."""

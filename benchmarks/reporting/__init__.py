"""Result files read: Markdown tables, a page with pictures, and what changed between two runs."""

"""One self-contained HTML page from typed parts: text, sortable tables, plots and images, without any request."""

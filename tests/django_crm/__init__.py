"""A Django application with a CRM's table, and the middleware of the documents."""

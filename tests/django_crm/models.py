"""LeadFi's table, as Django sees it."""

from django.db import models


class Lead(models.Model):  # type: ignore[misc]  # Django has no types
    """A lead."""

    lead_id = models.AutoField(primary_key=True)
    full_name = models.TextField()
    source = models.TextField(default="web")
    bd_in_charge = models.TextField(default="bob")
    type = models.TextField(default="otc")

    class Meta:
        managed = False
        db_table = "lead"

"""Settings of a project without a database yet: who visits it says which."""

SECRET_KEY = "no secret"
ALLOWED_HOSTS = ["*"]
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django_crm"]
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", "NAME": "not known yet"}}
SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
ROOT_URLCONF = "django_crm.views"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django_crm.changed_by.ChangedBy",  # made of docs/context.md
]

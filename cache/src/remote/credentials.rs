//! From an address and the environment to a store that can be asked. Credentials come from the
//! environment or from the usual profile files, and stay in the store and in [`Secrets`].

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as S3Key};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{BackoffConfig, ClientConfigKey, RetryConfig};

use crate::remote::address::Service;
use crate::remote::objects::Both;
use crate::remote::profile::Profile;
use crate::remote::secrets::Secrets;
use crate::remote::settings::Timeouts;
use crate::remote::watch::Connector;

type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;
type Opened = (Arc<dyn Both>, Secrets);

/// What is taken over of AWS's environment, under the names of its own tools.
const AWS: [&str; 25] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL_STS",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_CHECKSUM_ALGORITHM",
    "AWS_CONDITIONAL_PUT",
    "AWS_REQUEST_PAYER",
    "AWS_S3_EXPRESS",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_SSE_BUCKET_KEY_ENABLED",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
];
const GOOGLE: [&str; 7] = [
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_BEARER_TOKEN",
    "GOOGLE_SKIP_SIGNATURE",
    "GOOGLE_BASE_URL",
];
const AZURE: [&str; 14] = [
    "AZURE_STORAGE_ACCOUNT_NAME",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_STORAGE_USE_EMULATOR",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_TENANT_ID",
    "AZURE_AUTHORITY_HOST",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_SKIP_SIGNATURE",
];

/// The bucket at `service`, with what `env` says of it.
pub(super) fn open(
    service: Service,
    bucket: &str,
    env: Env<'_>,
    timeouts: &Timeouts,
) -> Result<Opened, String> {
    let mut secrets = Secrets::default();
    let opened = match service {
        Service::S3 => s3(bucket, env, timeouts, &mut secrets),
        Service::Google => google(bucket, env, timeouts, &mut secrets),
        Service::Azure => azure(bucket, env, timeouts, &mut secrets),
    };
    match opened {
        Ok(store) => Ok((store, secrets)),
        Err(why) => Err(secrets.scrub(why)),
    }
}

/// The variables of `names` that are set and not empty; what looks like a secret is noted.
fn set<'n>(
    names: &[&'n str],
    env: Env<'_>,
    secrets: &mut Secrets,
) -> Result<Vec<(&'n str, String)>, String> {
    let mut found = Vec::new();
    for name in names {
        let Some(value) = env(name).filter(|v| !v.is_empty()) else { continue };
        let value = value.into_string().map_err(|_| format!("`{name}` is not UTF-8"))?;
        let file = name.ends_with("_FILE") || name.ends_with("_PATH");
        if ["KEY", "SECRET", "TOKEN"].iter().any(|word| name.contains(word)) && !file {
            secrets.add(&value);
        }
        found.push((*name, value));
    }
    Ok(found)
}

fn s3(
    bucket: &str,
    env: Env<'_>,
    timeouts: &Timeouts,
    secrets: &mut Secrets,
) -> Result<Arc<dyn Both>, String> {
    let found = set(&AWS, env, secrets)?;
    let has = |name: &str| found.iter().any(|(n, _)| *n == name);
    let profile = Profile::read(env)?;
    let mut builder = AmazonS3Builder::new().with_bucket_name(bucket).with_retry(once());
    for (name, value) in &found {
        let key = name.to_lowercase().parse::<S3Key>().expect("names that the library knows");
        builder = builder.with_config(key, value);
    }
    let from_env = has("AWS_ACCESS_KEY_ID") || has("AWS_SECRET_ACCESS_KEY");
    if !from_env {
        builder = from_profile(builder, &profile, secrets);
    }
    let other = ["AWS_SKIP_SIGNATURE", "AWS_METADATA_ENDPOINT", "AWS_WEB_IDENTITY_TOKEN_FILE"];
    let other = other.iter().any(|name| has(name))
        || found.iter().any(|(name, _)| name.starts_with("AWS_CONTAINER_CREDENTIALS"));
    if !from_env && profile.get("aws_access_key_id").is_none() && !other {
        return Err(no_credentials(&profile));
    }
    if !has("AWS_REGION")
        && !has("AWS_DEFAULT_REGION")
        && let Some(region) = profile.get("region")
    {
        builder = builder.with_region(region);
    }
    if !has("AWS_ENDPOINT_URL")
        && !has("AWS_ENDPOINT_URL_S3")
        && let Some(endpoint) = profile.endpoint()
    {
        builder = builder.with_endpoint(endpoint);
    }
    // Whoever gives an endpoint without TLS means it, and AWS's own tools ask no more either.
    let endpoint = [S3Key::S3Endpoint, S3Key::Endpoint];
    let endpoint = endpoint.iter().find_map(|key| builder.get_config_value(key));
    let plain = endpoint.is_some_and(|url| url.starts_with("http://"));
    let allowed = S3Key::Client(ClientConfigKey::AllowHttp);
    let builder = builder
        .with_config(allowed, plain.to_string())
        .with_http_connector(connector(env, timeouts)?);
    Ok(Arc::new(builder.build().map_err(|e| e.to_string())?))
}

fn from_profile(
    mut builder: AmazonS3Builder,
    profile: &Profile,
    secrets: &mut Secrets,
) -> AmazonS3Builder {
    let keys = [
        ("aws_access_key_id", S3Key::AccessKeyId),
        ("aws_secret_access_key", S3Key::SecretAccessKey),
        ("aws_session_token", S3Key::Token),
    ];
    for (name, key) in keys {
        if let Some(value) = profile.get(name) {
            secrets.add(value);
            builder = builder.with_config(key, value);
        }
    }
    builder
}

fn no_credentials(profile: &Profile) -> String {
    let name = &profile.name;
    if let Some(how) = profile.unsupported() {
        return format!(
            "the AWS profile `{name}` gets its credentials by `{how}`, which is not supported\n\
             hint: eval \"$(aws configure export-credentials --profile {name} --format env)\""
        );
    }
    "there are no credentials for S3\n\
     hint: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile of \
     ~/.aws/credentials"
        .to_string()
}

fn google(
    bucket: &str,
    env: Env<'_>,
    timeouts: &Timeouts,
    secrets: &mut Secrets,
) -> Result<Arc<dyn Both>, String> {
    let mut found = set(&GOOGLE, env, secrets)?;
    let usual = env("HOME").map(PathBuf::from);
    let usual = usual.map(|h| h.join(".config/gcloud/application_default_credentials.json"));
    if found.iter().all(|(name, _)| *name == "GOOGLE_BASE_URL") {
        let usual = usual.filter(|path| path.exists()).ok_or(
            "there are no credentials for Google Cloud Storage\n\
             hint: set GOOGLE_APPLICATION_CREDENTIALS to the path of a key, or \
             `gcloud auth application-default login`",
        )?;
        found.push(("GOOGLE_APPLICATION_CREDENTIALS", usual.display().to_string()));
    }
    let mut builder = GoogleCloudStorageBuilder::new().with_bucket_name(bucket).with_retry(once());
    let mut plain = false;
    for (name, value) in &found {
        let key = name.to_lowercase().parse::<GoogleConfigKey>().expect("names of the library");
        builder = builder.with_config(key, value);
        plain |= *name == "GOOGLE_BASE_URL" && value.starts_with("http://");
    }
    let allowed = GoogleConfigKey::Client(ClientConfigKey::AllowHttp);
    let builder = builder
        .with_config(allowed, plain.to_string())
        .with_http_connector(connector(env, timeouts)?);
    Ok(Arc::new(builder.build().map_err(|e| e.to_string())?))
}

fn azure(
    container: &str,
    env: Env<'_>,
    timeouts: &Timeouts,
    secrets: &mut Secrets,
) -> Result<Arc<dyn Both>, String> {
    let found = set(&AZURE, env, secrets)?;
    let has = |name: &str| found.iter().any(|(n, _)| *n == name);
    if !has("AZURE_STORAGE_ACCOUNT_NAME") && !has("AZURE_STORAGE_USE_EMULATOR") {
        return Err("which storage account of Azure is not known\n\
                    hint: set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, \
                    AZURE_STORAGE_SAS_TOKEN or AZURE_CLIENT_ID"
            .to_string());
    }
    let mut builder = MicrosoftAzureBuilder::new().with_container_name(container);
    let mut plain = has("AZURE_STORAGE_USE_EMULATOR");
    for (name, value) in &found {
        let key = name.to_lowercase().parse::<AzureConfigKey>().expect("names of the library");
        builder = builder.with_config(key, value);
        plain |= *name == "AZURE_STORAGE_ENDPOINT" && value.starts_with("http://");
    }
    let allowed = AzureConfigKey::Client(ClientConfigKey::AllowHttp);
    let builder = builder
        .with_config(allowed, plain.to_string())
        .with_retry(once())
        .with_http_connector(connector(env, timeouts)?);
    Ok(Arc::new(builder.build().map_err(|e| e.to_string())?))
}

fn connector(env: Env<'_>, timeouts: &Timeouts) -> Result<Connector, String> {
    let roots = env("AWS_CA_BUNDLE").filter(|v| !v.is_empty()).map(PathBuf::from);
    let read = |path: &PathBuf| {
        fs::read(path).map_err(|e| format!("cannot read AWS_CA_BUNDLE `{}`: {e}", path.display()))
    };
    let pem = roots.as_ref().map(read).transpose()?;
    Connector::new(timeouts.clone(), pem.as_deref())
}

/// The library does not try again by itself: how long to try is decided above.
fn once() -> RetryConfig {
    RetryConfig {
        max_retries: 0,
        backoff: BackoffConfig::default(),
        retry_timeout: std::time::Duration::from_secs(60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_one_of_the_library() {
        for name in AWS {
            name.to_lowercase().parse::<S3Key>().expect(name);
        }
        for name in GOOGLE {
            name.to_lowercase().parse::<GoogleConfigKey>().expect(name);
        }
        for name in AZURE {
            name.to_lowercase().parse::<AzureConfigKey>().expect(name);
        }
    }
}

//! Reads what a client sends: bodies with limits of size and time, JSON and queries with errors that name the field.

use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::problem::ApiError;

/// Largest body (bytes).
pub const LIMIT: usize = 1 << 20;
/// How long a body may take to come.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A JSON body. An empty one is taken for `{}`.
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let media_type = request.headers().get(header::CONTENT_TYPE).cloned();
        let bytes = read(request.into_body()).await?;
        if bytes.is_empty() {
            return parse(b"{}").map(Self);
        }
        // Without a media type it is taken for what it must be; curl's own default is refused by name.
        let is_json = media_type.as_ref().is_none_or(|t| {
            let t = t.to_str().unwrap_or("").split(';').next().unwrap_or("").trim();
            t.eq_ignore_ascii_case("application/json")
        });
        if !is_json {
            let detail = format!("the body is sent as {media_type:?}; it must be application/json");
            let problem = ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "media-type",
                "Not JSON",
                detail,
            );
            return Err(problem.hint("with curl: -H 'content-type: application/json'"));
        }
        parse(&bytes).map(Self)
    }
}

/// A body of bytes.
pub struct Octets(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for Octets {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        read(request.into_body()).await.map(Self)
    }
}

async fn read(body: Body) -> Result<Bytes, ApiError> {
    let too_large = || {
        let detail = format!("the body is larger than {LIMIT} bytes");
        ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            "The body is too large",
            detail,
        )
    };
    // Told by its length: refused before any of it is read.
    if hyper::body::Body::size_hint(&body).lower() > LIMIT as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(TIMEOUT, Limited::new(body, LIMIT).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(error)) => {
            let detail = format!("reading the body failed: {error}");
            Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "body",
                "The body could not be read",
                detail,
            ))
        }
        Err(_) => {
            let detail = format!("the body did not come within {} seconds", TIMEOUT.as_secs());
            Err(ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "timeout",
                "The body did not come",
                detail,
            ))
        }
    }
}

/// Parses JSON; an error names the field, line and column.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // serde would take an array for a struct, field by field.
    if bytes.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(match serde_json::from_slice::<serde::de::IgnoredAny>(bytes) {
            Ok(_) => unusable("the body is no JSON object"),
            Err(error) => malformed(&error),
        });
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let parsed =
        serde_path_to_error::deserialize(&mut json).map_err(|e| (e.path().to_string(), e.into_inner()));
    let error = match parsed {
        Ok(value) => match json.end() {
            Ok(()) => return Ok(value),
            Err(error) => (String::new(), error),
        },
        Err(error) => error,
    };
    let (path, error) = error;
    Err(match error.is_data() {
        true => unusable(error.to_string()).field((path != "." && !path.is_empty()).then_some(path)),
        // Where the text broke off is told by line and column; the path there is no field's.
        false => malformed(&error),
    })
}

fn unusable(detail: impl Into<String>) -> ApiError {
    let title = "A field cannot be used";
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid-field", title, detail)
        .hint("GET /v1/openapi.json describes all fields")
}

fn malformed(error: &serde_json::Error) -> ApiError {
    ApiError::new(
        StatusCode::BAD_REQUEST,
        "malformed-json",
        "The body is no JSON",
        error.to_string(),
    )
}

/// The query of a request.
pub struct Query<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(query) => Ok(Self(query.0)),
            Err(error) => Err(ApiError::new(
                StatusCode::BAD_REQUEST,
                "invalid-query",
                "The query cannot be used",
                error.body_text(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shoal_api_types::CreateGuest;

    fn problem(json: &str) -> shoal_api_types::Problem {
        *parse::<CreateGuest>(json.as_bytes()).unwrap_err().0
    }

    #[test]
    fn names_the_field_and_the_place() {
        let p = problem(r#"{"kernel":{"path":"/k"},"disks":[{"path":"/a"},{"path":7}]}"#);
        assert_eq!((p.status, p.field.as_deref()), (422, Some("disks[1].path")));
        assert!(
            p.detail.contains("integer `7`") && p.detail.contains("line 1 column"),
            "{}",
            p.detail
        );
        let p = problem(r#"{"kernel":{"path":"/k","paht":1}}"#);
        assert_eq!((p.status, p.field.as_deref()), (422, Some("kernel.paht")));
        let p = problem(r#"{"vcpus":1}"#);
        assert!(
            p.status == 422 && p.detail.contains("missing field `kernel`"),
            "{p:?}"
        );
        let p = problem(r#"{"kernel":{"path":"/k"},"vcpus":-1}"#);
        assert_eq!((p.status, p.field.as_deref()), (422, Some("vcpus")));
        let syntax = [
            "{",
            "{\"kernel\":",
            "nul",
            "[1,",
            r#"{"kernel":{"path":"/k"}} x"#,
            r#"{"kernel":{"path":"/k"},}"#,
        ];
        for bad in syntax {
            let p = problem(bad);
            assert_eq!(p.status, 400, "{bad}: {p:?}");
            assert!(p.detail.contains("line 1 column"), "{bad}: {p:?}");
        }
        for bad in ["[]", "7", "null", "[{}]"] {
            assert_eq!(problem(bad).status, 422, "{bad}");
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(problem(&deep).status >= 400);
    }
}

//! Errors as RFC 9457 problem documents.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use shoal_api_types::{PROBLEM_TYPE, Problem};
use shoal_host::{HostError, chain};

/// A problem on its way out.
#[derive(Debug)]
pub struct ApiError(pub Box<Problem>);

impl ApiError {
    /// A problem of kind `kind` (the end of its type's name).
    pub fn new(status: StatusCode, kind: &str, title: &str, detail: impl Into<String>) -> Self {
        Self(Box::new(Problem {
            kind: format!("urn:shoal:problem:{kind}"),
            title: title.to_owned(),
            status: status.as_u16(),
            detail: detail.into(),
            field: None,
            hint: None,
            instance: None,
        }))
    }

    /// Names the field that is to blame.
    pub fn field(mut self, field: Option<impl Into<String>>) -> Self {
        self.0.field = field.map(Into::into);
        self
    }

    /// Says what can be done.
    pub fn hint(mut self, hint: &str) -> Self {
        self.0.hint = Some(hint.to_owned());
        self
    }
}

impl From<HostError> for ApiError {
    fn from(error: HostError) -> Self {
        let (status, kind, title, hint) = class(&error);
        if status.is_server_error() {
            tracing::error!(error = %chain(&error), "a request failed");
        }
        let detail = match &error {
            HostError::Invalid { why, .. } => why.clone(),
            other => chain(other),
        };
        let problem = Self::new(status, kind, title, detail).field(error.field());
        if hint.is_empty() {
            problem
        } else {
            problem.hint(hint)
        }
    }
}

fn class(error: &HostError) -> (StatusCode, &'static str, &'static str, &'static str) {
    match error {
        HostError::Invalid { .. } => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-field",
            "A field cannot be used",
            "",
        ),
        HostError::Refused(failure) if failure.field.is_some() => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-field",
            "A field cannot be used",
            "",
        ),
        HostError::NotFound(_) => (
            StatusCode::NOT_FOUND,
            "no-such-guest",
            "No such guest",
            "GET /v1/guests lists all guests",
        ),
        HostError::NameTaken { .. } => (
            StatusCode::CONFLICT,
            "name-taken",
            "The name is taken",
            "choose another name, or delete the guest that has it",
        ),
        HostError::WrongState { action, state, .. } => (
            StatusCode::CONFLICT,
            "wrong-state",
            "The guest's state does not allow it",
            state_hint(action, state),
        ),
        HostError::InUse { .. } => (
            StatusCode::CONFLICT,
            "in-use",
            "It is in use",
            "stop the other guest, or attach the disk read-only in both",
        ),
        HostError::Kvm { .. } => (
            StatusCode::SERVICE_UNAVAILABLE,
            "no-kvm",
            "KVM cannot be used",
            "run `shoal doctor`",
        ),
        HostError::Closing => (
            StatusCode::SERVICE_UNAVAILABLE,
            "closing",
            "The daemon is shutting down",
            "try again when it is up; guests go on running",
        ),
        HostError::Refused(_) | HostError::StartFailed { .. } | HostError::Jail(_) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "start-failed",
            "The guest could not be started",
            "`shoal doctor` tells what this machine can run",
        ),
        HostError::NotDone { failure, .. } if failure.field.is_some() => (
            StatusCode::UNPROCESSABLE_ENTITY,
            "invalid-field",
            "A field cannot be used",
            "",
        ),
        HostError::NotDone { .. } | HostError::Link(_) | HostError::Io { .. } | HostError::Store(_) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "The daemon could not do it",
            "the daemon's log may tell more",
        ),
    }
}

fn state_hint(action: &str, state: &str) -> &'static str {
    match (action, state) {
        ("start", _) => "it can be started when it is created, stopped or failed",
        ("delete", _) => "stop it first, or delete with ?force=true",
        _ => "it must be running; start it first",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(&*self.0)).into_response();
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_TYPE));
        response.extensions_mut().insert(self.0);
        response
    }
}

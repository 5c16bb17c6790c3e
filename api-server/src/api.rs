//! The routes.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, Uri, header};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::{Json as JsonAnswer, Router};
use serde::Deserialize;
use shoal_api_types::{
    CONSOLE_LOST, CONSOLE_NEXT, CreateGuest, Guest, Guests, Health, Problem, SetLimits, StopGuest, Version,
};
use shoal_host::{ConsoleReader, Host, chain, now_ns};
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::body::{Json, Octets, Query};
use crate::convert;
use crate::problem::ApiError;

type Answer<T> = Result<T, ApiError>;

/// The routes, and the document that describes them.
pub fn router(host: Host) -> (Router, OpenApi) {
    let (router, mut document) = OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(show, delete))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(limit))
        .routes(routes!(console, type_in))
        .routes(routes!(version))
        .routes(routes!(health))
        .routes(routes!(openapi))
        .split_for_parts();
    document.info = utoipa::openapi::Info::new("Shoal", env!("CARGO_PKG_VERSION"));
    document.info.description = Some("microVM guests on one host".into());
    let served = document.clone();
    let router = router
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(axum::Extension(std::sync::Arc::new(served)))
        .layer(from_fn(name_instance))
        .with_state(host);
    (router, document)
}

/// Puts the path that was asked for into problems.
async fn name_instance(request: Request, next: Next) -> Response {
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    match response.extensions_mut().remove::<Box<Problem>>() {
        Some(mut problem) => {
            problem.instance = Some(path);
            let headers = std::mem::take(response.headers_mut());
            let mut named = ApiError(problem).into_response();
            if let Some(allow) = headers.get(header::ALLOW) {
                named.headers_mut().insert(header::ALLOW, allow.clone());
            }
            named
        }
        None => response,
    }
}

async fn not_found(uri: Uri) -> ApiError {
    let detail = format!("there is nothing at {}", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "no-such-path", "No such path", detail)
        .hint("GET /v1/openapi.json describes all paths")
}

async fn not_allowed(request: Request) -> ApiError {
    let detail = format!("{} does not do {}", request.uri().path(), request.method());
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "method",
        "The method is not allowed",
        detail,
    )
    .hint("the header `allow` names those that are")
}

async fn described(host: &Host, guest: &str) -> Answer<Guest> {
    let view = host.show(guest)?;
    Ok(convert::guest(&view, host.memory(guest).await?))
}

/// Creates a guest, and starts it when asked to.
#[utoipa::path(
    post, path = "/v1/guests", tag = "guests", request_body = CreateGuest,
    responses(
        (status = 201, description = "created; `location` names it", body = Guest),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn create(State(host): State<Host>, Json(guest): Json<CreateGuest>) -> Answer<Response> {
    let received_ns = now_ns();
    let start = guest.start;
    let created = host.create(convert::spec(guest)?).await?;
    let view = if start {
        start_or_forget(&host, &created.id, received_ns).await?
    } else {
        created
    };
    let location = [(header::LOCATION, format!("/v1/guests/{}", view.id))];
    Ok((
        StatusCode::CREATED,
        location,
        JsonAnswer(convert::guest(&view, None)),
    )
        .into_response())
}

/// In a task of its own, so that a client that goes away leaves no guest that was created but neither started nor
/// forgotten.
async fn start_or_forget(host: &Host, id: &str, received_ns: u64) -> Answer<shoal_host::GuestView> {
    let (host, id) = (host.clone(), id.to_owned());
    let task = tokio::spawn(async move {
        let started = host.start(&id, received_ns).await;
        if started.is_err()
            && let Err(error) = host.delete(&id, true).await
        {
            tracing::error!(guest = id, error = %chain(&error), "a guest that did not start could not be forgotten");
        }
        started
    });
    Ok(task.await.map_err(|_| shoal_host::HostError::Closing)??)
}

/// Lists all guests.
#[utoipa::path(
    get, path = "/v1/guests", tag = "guests",
    responses((status = 200, description = "all guests", body = Guests))
)]
async fn list(State(host): State<Host>) -> JsonAnswer<Guests> {
    JsonAnswer(Guests {
        guests: host
            .list()
            .iter()
            .map(|view| convert::guest(view, None))
            .collect(),
    })
}

/// Shows a guest: its state, its boot timeline, what it costs in memory.
#[utoipa::path(
    get, path = "/v1/guests/{guest}", tag = "guests", params(("guest" = String, Path, description = "id or name")),
    responses(
        (status = 200, description = "the guest", body = Guest),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn show(State(host): State<Host>, Path(guest): Path<String>) -> Answer<JsonAnswer<Guest>> {
    Ok(JsonAnswer(described(&host, &guest).await?))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct DeleteQuery {
    /// End a guest that runs.
    #[serde(default)]
    force: bool,
}

/// Forgets a guest and removes its files (not its disks).
#[utoipa::path(
    delete, path = "/v1/guests/{guest}", tag = "guests",
    params(("guest" = String, Path, description = "id or name"), DeleteQuery),
    responses(
        (status = 204, description = "it is gone"),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn delete(
    State(host): State<Host>,
    Path(guest): Path<String>,
    Query(query): Query<DeleteQuery>,
) -> Answer<StatusCode> {
    host.delete(&guest, query.force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Starts a guest. Answers when its first instruction is about to run.
#[utoipa::path(
    post, path = "/v1/guests/{guest}/start", tag = "guests", params(("guest" = String, Path, description = "id or name")),
    responses(
        (status = 200, description = "it runs", body = Guest),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn start(State(host): State<Host>, Path(guest): Path<String>) -> Answer<JsonAnswer<Guest>> {
    let view = host.start(&guest, now_ns()).await?;
    Ok(JsonAnswer(convert::guest(&view, None)))
}

/// Asks a guest to stop, and ends it when it has not done so in time. Answers when it has ended.
#[utoipa::path(
    post, path = "/v1/guests/{guest}/stop", tag = "guests", params(("guest" = String, Path, description = "id or name")),
    request_body = StopGuest,
    responses(
        (status = 200, description = "it has ended; `stopped` tells how", body = Guest),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn stop(
    State(host): State<Host>,
    Path(guest): Path<String>,
    Json(stop): Json<StopGuest>,
) -> Answer<JsonAnswer<Guest>> {
    if stop.deadline_ms > StopGuest::MAX_DEADLINE_MS {
        let detail = format!("{} ms is more than an hour", stop.deadline_ms);
        let title = "A field cannot be used";
        return Err(
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid-field", title, detail)
                .field(Some("deadline_ms")),
        );
    }
    let view = host.stop(&guest, Duration::from_millis(stop.deadline_ms)).await?;
    Ok(JsonAnswer(convert::guest(&view, None)))
}

/// Changes limits of a guest's devices: at once if it runs, and for its next starts.
#[utoipa::path(
    patch, path = "/v1/guests/{guest}/limits", tag = "guests", params(("guest" = String, Path, description = "id or name")),
    request_body = SetLimits,
    responses(
        (status = 200, description = "they are in force", body = Guest),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn limit(
    State(host): State<Host>,
    Path(guest): Path<String>,
    Json(set): Json<SetLimits>,
) -> Answer<JsonAnswer<Guest>> {
    let view = host.set_limits(&guest, convert::limit_changes(set)).await?;
    Ok(JsonAnswer(convert::guest(&view, None)))
}

#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
struct ConsoleQuery {
    /// Byte to begin with, counted from the guest's first output.
    #[serde(default)]
    offset: u64,
    /// Go on as output comes, until the guest ends.
    #[serde(default)]
    follow: bool,
}

/// Reads the serial console: what is kept of it, or the live stream.
#[utoipa::path(
    get, path = "/v1/guests/{guest}/console", tag = "console",
    params(("guest" = String, Path, description = "id or name"), ConsoleQuery),
    responses(
        (status = 200, description = "the output", body = Vec<u8>, content_type = "application/octet-stream", headers(
            ("shoal-console-next" = u64, description = "offset of what follows (not with `follow`)"),
            ("shoal-console-lost" = u64, description = "bytes from `offset` on that are not kept any more (not with `follow`)"),
        )),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn console(
    State(host): State<Host>,
    Path(guest): Path<String>,
    Query(query): Query<ConsoleQuery>,
) -> Answer<Response> {
    let media_type = (header::CONTENT_TYPE, "application/octet-stream");
    if query.follow {
        let reader = host.console_stream(&guest, query.offset)?;
        return Ok(([media_type], Body::from_stream(stream(reader))).into_response());
    }
    let chunk = host.console(&guest, query.offset).await?;
    let headers = [
        (CONSOLE_NEXT, chunk.next.to_string()),
        (CONSOLE_LOST, chunk.lost.to_string()),
    ];
    Ok(([media_type], headers, chunk.bytes).into_response())
}

fn stream(reader: ConsoleReader) -> impl futures_util::Stream<Item = Result<Vec<u8>, std::io::Error>> {
    futures_util::stream::unfold(reader, |mut reader| async {
        match reader.next().await {
            Ok(Some(chunk)) => Some((Ok(chunk.bytes), reader)),
            Ok(None) => None,
            Err(error) => Some((Err(std::io::Error::other(chain(&error))), reader)),
        }
    })
}

/// Types into the serial console: at most 4096 bytes.
#[utoipa::path(
    post, path = "/v1/guests/{guest}/console", tag = "console",
    params(("guest" = String, Path, description = "id or name")),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses(
        (status = 204, description = "the guest's serial port has it"),
        (status = "default", description = "a problem", body = Problem, content_type = "application/problem+json"),
    )
)]
async fn type_in(
    State(host): State<Host>,
    Path(guest): Path<String>,
    Octets(bytes): Octets,
) -> Answer<StatusCode> {
    host.console_input(&guest, bytes.into()).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tells the daemon's version.
#[utoipa::path(get, path = "/v1/version", tag = "daemon", responses((status = 200, description = "the version", body = Version)))]
async fn version() -> JsonAnswer<Version> {
    JsonAnswer(Version {
        version: env!("CARGO_PKG_VERSION").into(),
        vmm_protocol: shoal_host::VMM_PROTOCOL,
    })
}

/// Tells that the daemon answers.
#[utoipa::path(get, path = "/v1/health", tag = "daemon", responses((status = 200, description = "it answers", body = Health)))]
async fn health(State(host): State<Host>) -> JsonAnswer<Health> {
    let guests = host.list();
    let running = guests
        .iter()
        .filter(|g| g.state == shoal_host::State::Running)
        .count();
    JsonAnswer(Health {
        status: "ok".into(),
        guests: guests.len(),
        running,
    })
}

/// The OpenAPI document of this API.
#[utoipa::path(get, path = "/v1/openapi.json", tag = "daemon", responses((status = 200, description = "OpenAPI 3.1", body = Object)))]
async fn openapi(document: axum::Extension<std::sync::Arc<OpenApi>>) -> JsonAnswer<OpenApi> {
    JsonAnswer(OpenApi::clone(&document.0))
}

// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! `grpc.Health`: the runtime's "has the guest booted" and "does it still live".

use async_trait::async_trait;
use ecr_agent_protocol::API_VERSION;
use ecr_agent_protocol::health::health_check_response::ServingStatus;
use ecr_agent_protocol::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse};
use ecr_agent_protocol::health_ttrpc;
use ttrpc::Result;
use ttrpc::r#async::TtrpcContext;

use super::VERSION;

pub struct Health;

#[async_trait]
impl health_ttrpc::Health for Health {
    /// An agent that can answer is serving.
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> Result<HealthCheckResponse> {
        Ok(HealthCheckResponse { status: ServingStatus::SERVING.into(), ..Default::default() })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: API_VERSION.into(),
            agent_version: VERSION.into(),
            ..Default::default()
        })
    }
}

// SPDX-License-Identifier: Apache-2.0
// Copyright The ecr Authors

//! What a sandbox takes of the host.
